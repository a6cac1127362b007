"""What one guided step of the host costs: operators, bytes, FLOPs, memory, and where it waits for the device."""
