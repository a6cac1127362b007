"""Variants of the system on held-out people: views are generated once, kept and measured in several processes."""
