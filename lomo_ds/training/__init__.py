"""The main job: from a recipe to a trained model, its metrics and its plot."""
