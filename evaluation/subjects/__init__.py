"""What is generated and judged: held-out people, folders of views, variants of the system."""
