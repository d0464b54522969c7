"""Everything that is read or written about photos, scenes and a judge's answers."""
