"""What a local backend does to its process."""

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nnsight import TransformersModel
from oracle import LOGIT_DIFF, TOLERANCE, Subject, token_pair

from remote_mediation.engine import heap
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.rows import Row, swap
from remote_mediation.errors import OutOfMemoryError
from remote_mediation.sites import Site

Subjects = Callable[[str], Subject]

_FAULTS = """
import resource, sys, torch
from remote_mediation.engine.local import LocalBackend

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = faults()
LocalBackend(None, None, limited=sys.argv[1] == "True")
faults()
print(fresh, faults())
"""


_PIECES = """
import torch
from remote_mediation.engine import heap

heap.keep_freed()
begin = heap.resident()
tensors = [torch.ones(2**20) for _ in range(100)]
kept = tensors[::10]  # what lives on lies between what goes
del tensors
freed = heap.resident()
heap.give_back_beyond(freed)
before = heap.resident()
heap.give_back_beyond(freed - 1)
print(freed - begin, before - begin, heap.resident() - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_pieces_of_freed_memory_are_given_back_where_they_are_too_many() -> None:
    done = subprocess.run([sys.executable, "-c", _PIECES], capture_output=True, text=True, check=True)
    freed, allowed, given_back = (int(size) / 2**22 for size in done.stdout.split())
    assert freed > 90  # of a hundred tensors, of which ten are left
    assert allowed > 90
    assert 5 <= given_back < 20  # ten live on; what was freed before the first of them goes, too


def test_a_job_leaves_little_more_than_it_found(subject: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limited backend gives all back, another what is beyond the limit that it took when it was made."""
    allowed: list[float] = []
    monkeypatch.setattr(heap, "give_back_beyond", allowed.append)
    model = another(subject("llama"), device="cpu")
    model.measure([token_pair("pair")], some_rows(model), LOGIT_DIFF)
    model = Subject(LocalBackend(model.backend.model, model.info, limited=True), model.plain)
    model.measure([token_pair("pair")], some_rows(model), LOGIT_DIFF)
    assert heap.KEPT < allowed[0] <= heap.resident() + heap.KEPT
    assert allowed[-1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_pages_that_tensors_free_are_used_again(limited: bool) -> None:
    done = subprocess.run([sys.executable, "-c", _FAULTS, str(limited)], capture_output=True, text=True, check=True)
    fresh, kept = map(int, done.stdout.split())
    assert fresh > 1000
    assert (kept < fresh / 10) == (not limited)


def some_rows(model: Subject) -> list[Row]:
    sites = [Site("mlp_output", layer, "all") for layer in range(model.info.layers)]
    return [swap(token_pair("pair"), site, base, model.info) for site in sites for base in (0, 1)]


def another(model: Subject, **settings: object) -> Subject:
    """The same folder loaded once more, by nnsight with settings of one's own."""
    loaded = TransformersModel(model.info.name, task="text-generation", dispatch=True, dtype=torch.float32, **settings)
    loaded.eval()
    return Subject(LocalBackend(loaded, model.info), model.plain)


def test_a_gpu_without_memory_is_told_of_with_what_to_do(subject: Subjects) -> None:
    model = another(subject("llama"), device="cpu")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    model.backend.model._module.model.layers[1].mlp.register_forward_pre_hook(full)
    with pytest.raises(OutOfMemoryError, match=r"measure job of 6 rows.*Tried to allocate 9.00 GiB.*--max-memory"):
        model.measure([token_pair("pair")], some_rows(model), LOGIT_DIFF)


def test_products_are_whole_whatever_the_caller_has_switched_on(subject: Subjects) -> None:
    model, products, seen = another(subject("llama"), device="cpu"), torch.backends.cuda.matmul, set()
    model.backend.model._module.register_forward_pre_hook(lambda *_: seen.add(products.fp32_precision))
    products.allow_tf32 = True
    try:
        model.measure([token_pair("pair")], some_rows(model), LOGIT_DIFF)
        assert seen == {"ieee"}
        assert products.allow_tf32
    finally:
        products.allow_tf32 = False


def test_weights_that_are_fetched_for_their_layer_are_run_too(subject: Subjects, tmp_path: Path) -> None:
    """As where a GPU cannot hold a model: accelerate keeps some of its layers elsewhere."""
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places |= {f"model.layers.{layer}": "cpu" if layer else "disk" for layer in range(3)}
    model = another(subject("llama"), device_map=places, offload_folder=str(tmp_path))
    assert any(weight.is_meta for weight in model.backend.model._module.parameters())
    measured = model.compare([token_pair("pair")], some_rows(model), LOGIT_DIFF)
    assert measured.deviation < TOLERANCE
    assert np.abs(measured.effects).max() > 0.1


def test_the_processor_asked_for_is_used_beside_a_gpu(subject: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes the first GPU where it is not told otherwise; this torch cannot move anything there."""
    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)
    backend = LocalBackend.load(subject("llama").info.name, device="cpu")
    assert {weight.device.type for weight in backend.model._module.parameters()} == {"cpu"}


def test_auto_is_the_processor_where_there_is_no_gpu(subject: Subjects) -> None:
    backend = LocalBackend.load(subject("llama").info.name, device="auto")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert {weight.device.type for weight in backend.model._module.parameters()} == {expected}
