"""The block store: namespaces, chain hashes, tiers, leases, and the daemon around them."""
