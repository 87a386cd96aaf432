"""Catalog of models and GPUs that needs no network: catalog.py reads models.json and gpus.json."""
