"""Drawing results. Nothing is trained, merged or measured here."""
