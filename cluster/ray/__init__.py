"""Back end `ray`. Nothing but this package imports Ray, and only where it is used."""
