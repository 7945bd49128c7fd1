"""Maps of single sites: the residual stream by layer and by token, attention beside MLP, attention heads."""

from remote_mediation.analyses.maps import ask, show
from remote_mediation.result import Analysis

LAYERS = Analysis("layers", sites=ask.layer_sites, sections=show.layers)
MODULES = Analysis("modules", sites=ask.module_sites, sections=show.modules)
TOKENS = Analysis("tokens", sites=ask.token_sites, sections=show.tokens)
HEADS = Analysis("heads", sites=ask.head_sites, sections=show.heads)
