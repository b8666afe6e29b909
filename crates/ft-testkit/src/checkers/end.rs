//! What is demanded of the two hosts when a run is over.

use super::{EndState, Generation, HostId, Incarnation, Invariant, Judge, Role};

impl Judge {
    /// The run is over.
    pub fn finish(&mut self, hosts: &[EndState<'_>; 2], clients_done: bool) {
        self.check_end_of_power_off(hosts);
        if !self.clients.is_linearizable() {
            self.fail(Invariant::NothingLost, || {
                "no order of the clients' operations explains their answers".into()
            });
        }
        let Some(survivor) = self.who_must_go_on(hosts) else {
            return;
        };
        let host = &hosts[survivor.index()];
        for (order, chain) in self.acknowledged.clone() {
            if host.ledger.get(order as usize - 1) != Some(&chain) {
                self.fail(Invariant::NothingLost, || {
                    format!("record {order} was acknowledged; the survivor {survivor:?} has not got it")
                });
            }
        }
        if host.off && host.role != Role::Off {
            self.fail(Invariant::OrderlyEnd, || {
                format!("the guest on {survivor:?} powered off, its replica is {:?}", host.role)
            });
        }
        self.check_new_backup(survivor, hosts);
        if !clients_done && !host.off {
            self.fail(Invariant::Progress, || {
                let roles = [hosts[0].role, hosts[1].role];
                format!("{survivor:?} could serve, and some request is unanswered; the roles are {roles:?}")
            });
        }
    }

    fn check_end_of_power_off(&mut self, hosts: &[EndState<'_>; 2]) {
        if !self.off {
            return;
        }
        for host in hosts.iter().filter(|host| host.alive) {
            let seen = &self.seen[host.me.host.index()];
            // A side that never came to be one of the pair, or was not yet, has nothing to end.
            let took_part = seen.recorded || seen.paired && seen.eligible;
            let ended = host.role == Role::Off || (host.role == Role::Halted && !self.calm);
            if took_part && !ended {
                self.fail(Invariant::OrderlyEnd, || {
                    format!("the VM is off, and {:?} is {:?}", host.me.host, host.role)
                });
            }
        }
    }

    /// Whether a host is the backup of a generation, and may take over.
    fn is_backup(&self, host: HostId, generation: Generation) -> bool {
        let seen = &self.seen[host.index()];
        seen.paired && seen.eligible && seen.follows == Some(generation)
    }

    /// A host that was started as a new backup, and hears of the side that must go on, is its backup.
    fn check_new_backup(&mut self, survivor: HostId, hosts: &[EndState<'_>; 2]) {
        let (host, other) = (&hosts[survivor.index()], &hosts[survivor.other().index()]);
        let waits = other.alive && other.joins && matches!(other.role, Role::Pairing | Role::Replaying);
        let last = self.claims.keys().next_back().copied();
        let is_pair = host.role == Role::Recording && last.is_some_and(|last| self.is_backup(other.me.host, last));
        if waits && !host.off && !is_pair {
            self.fail(Invariant::Repaired, || {
                format!(
                    "{:?} asks {survivor:?} to be its backup; the roles are {:?} and {:?}",
                    other.me.host, other.role, host.role
                )
            });
        }
    }

    /// The side that must serve now that all faults are over, by the facts; `None` where too much is lost.
    fn who_must_go_on(&self, hosts: &[EndState<'_>; 2]) -> Option<HostId> {
        let is_up = |host: HostId| hosts[host.index()].alive && !self.seen[host.index()].failed;
        let is_same = |me: Incarnation| hosts[me.host.index()].me == me;
        let last = self.claims.iter().next_back();
        if let Some((generation, owner)) = last.filter(|(generation, _)| **generation > Generation::FIRST) {
            if is_same(*owner) && is_up(owner.host) {
                return Some(owner.host);
            }
            let backup = owner.host.other();
            let may_take_over = self.is_backup(backup, *generation) && is_up(backup);
            return may_take_over.then_some(backup);
        }
        let first = self.claims.get(&Generation::FIRST);
        let primary_holds = first.is_none_or(|owner| is_same(*owner)) && is_up(HostId::A);
        if primary_holds && (self.seen[0].recorded || is_up(HostId::B)) {
            return Some(HostId::A);
        }
        // A primary that is lost before its first entry is stored never began: nobody takes over nothing.
        let backup = &self.seen[1];
        (backup.paired && !backup.stored.is_empty() && is_up(HostId::B)).then_some(HostId::B)
    }
}
