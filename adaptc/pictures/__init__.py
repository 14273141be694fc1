"""Pictures of what adapters do: a layer before and after the rewrite, heat maps of sites, similarities."""
