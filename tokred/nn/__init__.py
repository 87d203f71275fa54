"""Backbones: attention, blocks with their places for reducers, ViT."""
