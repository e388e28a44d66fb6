"""The only place with sockets: event loop, worker threads, tunnels and bridges."""
