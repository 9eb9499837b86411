"""The bill of a recipe, predicted from its compiled train step."""
