"""Recipes: data, rewards and complete training runs, started as `python -m recipes.NAME`."""
