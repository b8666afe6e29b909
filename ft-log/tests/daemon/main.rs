//! Real daemons as processes, with fake shims and devices made of the client library.

mod acknowledgements;
mod arbiter;
mod configure;
mod control;
mod failover;
mod hostile;
mod journal;
mod kills;
mod many;
mod new_backup;
mod proxy;
mod reconnection;
mod refusals;
mod tls;
mod world;
