"""What every command needs: settings, files, processes, a run's folder and loop, errors."""
