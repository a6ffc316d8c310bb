"""What people look at adapters with."""
