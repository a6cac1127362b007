"""What is said of the measurements: means with intervals, expected orders, tables and figures."""
