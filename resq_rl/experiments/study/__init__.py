"""What one experiment works on, and the training and measuring of its methods."""
