"""Precis: a summarisation server. `python -m app` starts it; `app.main.create_app` builds the ASGI application."""
