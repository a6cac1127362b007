"""Multi-view portraits of other people's data sets, one module a source; `training.import_data` writes them in the
manifest format that `training.dataset.images` reads."""
