"""What verl's entry point loads, in each of its processes: verl calls nothing, it only imports."""

from .verl import patch_when_imported

patch_when_imported()
