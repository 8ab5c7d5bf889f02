"""The study of one experiment: its problems, and the training and measuring of its methods."""
