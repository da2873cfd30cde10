"""The networks themselves: torch modules, imported only where training happens."""
