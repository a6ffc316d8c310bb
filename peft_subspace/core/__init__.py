"""What the methods share: everything that follows from an update being a chain of matrices."""
