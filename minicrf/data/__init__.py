"""What goes in: data sets, photographs, weights."""
