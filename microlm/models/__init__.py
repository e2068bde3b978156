"""Every model behind one interface, in and out of directories, and the student cut out of its teacher. No training."""
