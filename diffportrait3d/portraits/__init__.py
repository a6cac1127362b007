"""Photographs on the way in and out: landmarks of a face, the crop that the networks know, and the way back."""
