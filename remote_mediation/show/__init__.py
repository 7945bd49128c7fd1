"""The kit that sections of a report are made of: tables, figures, words."""
