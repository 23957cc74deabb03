"""Between HTTP and a replica: what may be asked, and which replica answers."""
