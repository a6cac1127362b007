"""What is generated and measured: held-out people, folders of views, variants of the system."""
