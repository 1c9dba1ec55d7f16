"""Offline half of Precis: warm-start, fine-tune, evaluate and export an encoder-decoder.

May import `app.engine`, `app.tokenization` (so that what is exported is what is served) and `app.errors`; `app` never
imports it.
"""
