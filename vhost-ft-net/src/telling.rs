//! The event `counters`: what the device has counted so far, twice a second while that changes.

use ft_client::{
    counters::{Counters, Lost, OfDevice, OfQueue},
    events::Events,
};
use serde_json::{Map, Value, json};

/// Least time between two events.
const EVERY_NS: u64 = 500_000_000;

/// When to tell.
#[derive(Debug, Default)]
pub struct Teller {
    /// Other threads count too, and say nothing here.
    watchful: bool,
    changed: bool,
    due_ns: u64,
    told: Value,
}

impl Teller {
    /// For a device of several threads, of which this one tells.
    pub fn set_watchful(&mut self) {
        self.watchful = true;
    }

    /// Something was counted.
    pub fn note(&mut self) {
        self.changed = true;
    }

    /// Tells if it is due and there is news; gives when to be called again.
    pub fn tick(&mut self, now_ns: u64, counters: &Counters, events: &mut Events) -> Option<u64> {
        if !events.are_told() || !self.changed && !self.watchful {
            return None;
        }
        if now_ns >= self.due_ns {
            self.tell(counters, events);
            self.due_ns = now_ns + EVERY_NS;
        }
        (self.changed || self.watchful).then_some(self.due_ns)
    }

    /// Tells what is not told yet.
    pub fn tell(&mut self, counters: &Counters, events: &mut Events) {
        self.changed = false;
        if !events.are_told() {
            return;
        }
        let now = shown(counters);
        if now != self.told {
            events.emit("counters", now.clone());
            self.told = now;
        }
    }
}

/// All of it, by name. Of the lost frames only the reasons that there were.
#[must_use]
pub fn shown(counters: &Counters) -> Value {
    let of_queue = |queue: u16| {
        let counts = OfQueue::ALL.map(|(what, name, _)| (name, counters.of_queue(queue, what)));
        let mut fields: Map<_, _> = counts
            .map(|(name, count)| (name.into(), json!(count)))
            .into_iter()
            .collect();
        let lost = Lost::of(queue)
            .iter()
            .map(|(why, name)| (*name, counters.lost(queue, *why)));
        let lost: Map<_, _> = lost
            .filter(|(_, frames)| *frames != 0)
            .map(|(name, frames)| (name.into(), json!(frames)))
            .collect();
        fields.insert("lost".into(), lost.into());
        Value::from(fields)
    };
    let mut fields = Map::new();
    let queues: Vec<_> = (0..counters.queues().unwrap_or(0)).map(of_queue).collect();
    fields.insert("queues".into(), queues.into());
    for (what, name, _) in OfDevice::COUNTS.iter().chain(&OfDevice::AMOUNTS) {
        fields.insert((*name).into(), counters.of_device(*what).into());
    }
    let times = counters.hold_times().into_iter().filter(|(_, frames)| *frames != 0);
    let times = times.map(|(upper, frames)| json!([(upper != u64::MAX).then_some(upper), frames]));
    fields.insert("hold_microseconds".into(), times.collect());
    fields.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_told_when_it_is_due_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let mut events = Events::open("net", Some(&path)).unwrap();
        let told = || std::fs::read_to_string(&path).unwrap().lines().count();
        let counters = Counters::own(2);
        let mut teller = Teller::default();
        assert_eq!(teller.tick(0, &counters, &mut events), None);
        teller.note();
        counters.add(1, OfQueue::Frames, 3);
        assert_eq!(teller.tick(7, &counters, &mut events), None);
        assert_eq!(told(), 1);
        teller.note();
        counters.lose(1, Lost::TooLong, 1);
        assert_eq!(teller.tick(8, &counters, &mut events), Some(7 + EVERY_NS));
        assert_eq!(told(), 1);
        assert_eq!(teller.tick(7 + EVERY_NS, &counters, &mut events), None);
        assert_eq!(told(), 2);
        let last = std::fs::read_to_string(&path).unwrap();
        let last: Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
        assert_eq!(last["queues"][1]["frames"], 3);
        assert_eq!(last["queues"][1]["lost"], json!({ "too_long": 1 }));
        assert_eq!(last["queues"][0]["lost"], json!({}));
        // Noted, and the same as before.
        teller.note();
        assert_eq!(teller.tick(u64::MAX - EVERY_NS, &counters, &mut events), None);
        assert_eq!(told(), 2);
        // Nobody is told: nothing is due.
        let mut silent = Events::open("net", None).unwrap();
        teller.set_watchful();
        assert_eq!(teller.tick(0, &counters, &mut silent), None);
        assert!(teller.tick(0, &counters, &mut events).is_some());
    }
}
