"""Parts of the end-to-end benchmark ``e2e.py``: models, peers, measuring, reporting."""
