"""Pictures: reading and writing them, finding faces, obfuscating them, and painting scenes to train on."""
