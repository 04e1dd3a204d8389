"""Values that everything else speaks in: axes, specs, layouts, results. Nothing here reads a model or a file."""
