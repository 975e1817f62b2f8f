"""The pictures and tasks that the shipped model learned from."""
