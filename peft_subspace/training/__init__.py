"""What training needs besides the model: loss terms, data-parallel processes."""
