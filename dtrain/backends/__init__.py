"""Where a run goes. A backend is one file here, found by its name."""
