"""Offline half of Precis: warm-start, fine-tune, evaluate and export an encoder-decoder.

May import `app.engine` and `app.tokenization` (so that what is exported is what is served); `app` never imports it.
"""
