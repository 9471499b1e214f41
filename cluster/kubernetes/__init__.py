"""Back end `kubernetes`: an Indexed Job and a headless Service, made with namespaced rights."""
