"""The routes: parse, call the summarizer, shape the reply. Nothing is decided here."""
