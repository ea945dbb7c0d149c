"""Small things that every part uses: files, fingerprints, devices, the terminal."""
