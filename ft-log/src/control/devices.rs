//! What the network devices of every VM count ([`ft_client::counters`]), as metrics. Names and labels are of this side: a device writes
//! numbers, of itself.

use std::{fmt, sync::Arc};

use ft_client::{
    Counters,
    counters::{HOLD_BUCKETS, Lost, OfDevice, OfQueue},
};
use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use super::shared::Shared;

/// A device that counts.
struct Device<'a> {
    vm: &'a str,
    name: &'a str,
    counters: &'a Counters,
    queues: u16,
}

impl Device<'_> {
    fn labels(&self) -> [(&'static str, &str); 2] {
        [("vm", self.vm), ("device", self.name)]
    }
}

/// Appends all of them.
pub(super) fn encode(vms: &[Arc<Shared>], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let devices: Vec<_> = vms
        .iter()
        .flat_map(|shared| {
            let vm = shared.identity.vm.as_str();
            shared.counters().iter().filter_map(move |(name, counters)| {
                let queues = counters.queues()?;
                Some(Device {
                    vm,
                    name,
                    counters,
                    queues,
                })
            })
        })
        .collect();
    if devices.is_empty() {
        return Ok(());
    }
    encode_queues(&devices, encoder)?;
    for (what, name, help) in OfDevice::COUNTS {
        let name = format!("net_{name}");
        let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
        for device in &devices {
            let metric = ConstCounter::new(device.counters.of_device(what));
            metric.encode(family.encode_family(&device.labels())?)?;
        }
    }
    for (what, name, help) in OfDevice::AMOUNTS {
        let name = format!("net_{name}");
        let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
        for device in &devices {
            let amount = i64::try_from(device.counters.of_device(what)).unwrap_or(i64::MAX);
            ConstGauge::new(amount).encode(family.encode_family(&device.labels())?)?;
        }
    }
    encode_hold_times(&devices, encoder)
}

fn encode_queues(devices: &[Device<'_>], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let queue_name = |queue: u16| match queue.is_multiple_of(2) {
        true => format!("receive{}", queue / 2),
        false => format!("transmit{}", queue / 2),
    };
    for (what, name, help) in OfQueue::ALL {
        let name = format!("net_{name}");
        let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
        for device in devices {
            for queue in 0..device.queues {
                let [vm, of] = device.labels();
                let labels = [vm, of, ("queue", &queue_name(queue))];
                let metric = ConstCounter::new(device.counters.of_queue(queue, what));
                metric.encode(family.encode_family(&labels)?)?;
            }
        }
    }
    let mut family = encoder.encode_descriptor(
        "net_lost",
        "Frames that did not arrive, by reason",
        None,
        MetricType::Counter,
    )?;
    for device in devices {
        for queue in 0..device.queues {
            for (why, reason) in Lost::of(queue) {
                let [vm, of] = device.labels();
                let labels = [vm, of, ("queue", &queue_name(queue)), ("reason", reason)];
                let metric = ConstCounter::new(device.counters.lost(queue, *why));
                metric.encode(family.encode_family(&labels)?)?;
            }
        }
    }
    Ok(())
}

fn encode_hold_times(devices: &[Device<'_>], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let help = "Seconds that released frames were held";
    let mut family = encoder.encode_descriptor("net_hold_seconds", help, None, MetricType::Histogram)?;
    for device in devices {
        let (buckets, count) = buckets(&device.counters.hold_times());
        let sum = device.counters.of_device(OfDevice::HeldMicroseconds) as f64 / 1e6;
        let labels = device.labels();
        let mut metric = family.encode_family(&labels)?;
        metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
    }
    Ok(())
}

/// The classes in seconds, and all that is in them. The encoder adds them up: what a device says must not go beyond what it can hold.
fn buckets(times: &[(u64, u64); HOLD_BUCKETS]) -> ([(f64, u64); HOLD_BUCKETS], u64) {
    let mut left = u64::MAX;
    let buckets = times.map(|(upper, count)| {
        let count = count.min(left);
        left -= count;
        let seconds = if upper == u64::MAX {
            f64::MAX
        } else {
            upper as f64 / 1e6
        };
        (seconds, count)
    });
    (buckets, u64::MAX - left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_numbers_of_a_device_are_cut_and_do_not_overflow() {
        let mut times = [(1, 2); HOLD_BUCKETS];
        times[1].1 = u64::MAX;
        times[HOLD_BUCKETS - 1].0 = u64::MAX;
        let (buckets, count) = buckets(&times);
        assert_eq!(count, u64::MAX);
        assert_eq!((buckets[0].1, buckets[1].1, buckets[2].1), (2, u64::MAX - 2, 0));
        assert_eq!(buckets[HOLD_BUCKETS - 1], (f64::MAX, 0));
    }
}
