"""Export of a trained model to a program for serving, and scoring with it. Needs no Lightning."""
