"""The machinery that all stages share: configuration, loop, optimiser, processes, state, log."""
