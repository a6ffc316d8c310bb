"""The abstraction: updates, chains, shapes, linear algebra and checks. It imports torch only."""
