//! Command line, and the way from it to a running daemon.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use ft_vhost::{
    conventions::Conventions,
    daemon::{self, Engine, Signals},
    exit::End,
    guest_side::blk::{Geometry, ID_BYTES, QUEUES_MAX, SECTOR_BYTES},
    session::operator,
};
use tracing::info;

use crate::{
    disk::{Disk, OnEnospc, Policy, SERIAL},
    image::{Access, Image, LOCK_PATIENCE, Locking},
    standing::{Half, Standing},
};

/// What `--print-capabilities` says of the options of QEMU's schema.
const CAPABILITIES: &[&str] = &["read-only", "blk-file"];

/// vhost-user block device on a raw image. Exit codes: 0 ordinary end, 2 wrong usage, 3 environment, 4 halted, 6 this replica failed.
#[derive(Debug, Parser)]
#[command(name = "vhost-ft-blk", version, args_conflicts_with_subcommands = true)]
pub struct Arguments {
    #[command(subcommand)]
    order: Option<Order>,
    #[command(flatten)]
    conventions: Conventions,
    /// Raw image; its size is the disk's, a multiple of 512 bytes.
    #[arg(long, value_name = "IMAGE", required_unless_present = "print_capabilities")]
    blk_file: Option<PathBuf>,
    /// Where it is noted that the image may be outdated (engine device) [default: beside the image, with .ft-state after its name].
    #[arg(long, value_name = "FILE")]
    image_state: Option<PathBuf>,
    /// How the backup stays equal: lockstep under ft-vcpu-shim, or device under a stock VMM, whose writes are replicated.
    #[arg(
        long,
        value_enum,
        value_name = "ENGINE",
        default_value = "lockstep",
        requires = "ft_log"
    )]
    engine: Engine,
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
    /// Queues; a protected VM has one.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    num_queues: u16,
    /// Threads that serve the queues, each with an io_uring of its own; at most one for each queue.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)), conflicts_with = "ft_log")]
    io_threads: Option<u16>,
    /// Bytes of a logical block.
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = ["512", "4096"])]
    block_size: String,
    /// Bypass the page cache (O_DIRECT). Blocks must be as large as the image's file system or device wants them.
    #[arg(long, conflicts_with = "ft_log")]
    direct: bool,
    /// When a write is done: with its data in the host's cache, or on the disk. A driver can change it.
    #[arg(long, value_enum, value_name = "MODE", default_value = "writeback")]
    cache: Cache,
    /// What happens to a write that finds no space on the image's file system. A protected VM's gets the error.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "report")]
    on_enospc: OnEnospc,
    /// Look for more work for up to this many microseconds before sleeping; how long is learned, 0 never. Not for a protected VM.
    #[arg(long, value_name = "US", default_value_t = 32, value_parser = clap::value_parser!(u16).range(0..=1000))]
    poll_us: u16,
    /// Lock the image only while a queue runs: so that the daemon at the other end of a live migration can be there already.
    #[arg(long, conflicts_with = "ft_log")]
    migratable: bool,
    /// What the guest is told as the disk's serial, up to 20 bytes.
    #[arg(long, value_name = "TEXT", default_value = SERIAL, value_parser = serial)]
    serial: String,
}

/// What an operator tells a daemon that runs.
#[derive(Debug, Subcommand)]
enum Order {
    /// Give the disk a new size; the guest is told.
    Resize {
        /// The daemon's --control.
        #[arg(long, value_name = "SOCK")]
        control: PathBuf,
        /// Make the image this long first. Without it: look how long it is by now.
        bytes: Option<u64>,
    },
    /// Take an image for the one that counts, though the other one of its VM may be ahead of it.
    Accept {
        /// The image; nobody uses it.
        #[arg(long, value_name = "IMAGE")]
        blk_file: PathBuf,
        /// As that of the daemon.
        #[arg(long, value_name = "FILE")]
        image_state: Option<PathBuf>,
    },
}

impl Order {
    fn give(self) -> Result<(), End> {
        match self {
            Self::Resize { control, bytes } => {
                let line = bytes.map_or_else(|| "resize".into(), |bytes| format!("resize {bytes}"));
                let done = operator::command(&control, &line).map_err(End::environment)?;
                info!("{done}");
            }
            Self::Accept { blk_file, image_state } => {
                let access = Access::default();
                let block_bytes = SECTOR_BYTES as u32;
                // Its lock says that no daemon is about to note something else.
                let _image = Image::open(&blk_file, access, block_bytes, Locking::Life, LOCK_PATIENCE)
                    .map_err(End::environment)?;
                let standing = Standing::of(&blk_file, image_state.as_deref()).map_err(End::environment)?;
                standing.clear().map_err(End::environment)?;
                info!(image = %blk_file.display(), "from here on this image counts");
            }
        }
        Ok(())
    }
}

/// Cache modes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cache {
    /// Done is what a flush makes durable.
    Writeback,
    /// Done is durable.
    Writethrough,
}

fn serial(text: &str) -> Result<String, String> {
    match text.len() {
        0..=ID_BYTES => Ok(text.into()),
        bytes => Err(format!("{bytes} bytes, at most {ID_BYTES} reach the guest")),
    }
}

/// Runs the daemon.
///
/// # Errors
/// [`End`].
pub fn run(arguments: Arguments) -> Result<(), End> {
    if let Some(order) = arguments.order {
        return order.give();
    }
    let conventions = &arguments.conventions;
    if let Some(capabilities) = conventions.capabilities("block", CAPABILITIES) {
        println!("{capabilities}");
        return Ok(());
    }
    let blk_file = arguments.blk_file.as_deref().expect("clap asks for it");
    let mut options = conventions.options();
    if let Some(membership) = &mut options.membership {
        membership.engine = arguments.engine;
    }
    let signals = Signals::take().map_err(End::environment)?;
    let block_bytes = arguments.block_size.parse().expect("clap lets two sizes through");
    let locking = match arguments.migratable {
        true => Locking::WhileAttached,
        false => Locking::Life,
    };
    let access = Access {
        read_only: arguments.read_only,
        direct: arguments.direct,
    };
    let image = Image::open(blk_file, access, block_bytes, locking, LOCK_PATIENCE);
    let mut image = image.map_err(End::environment)?;
    let standing = Standing::of(blk_file, arguments.image_state.as_deref()).map_err(End::environment)?;
    // Under engine device the pair says what the image is worth, or that there is none.
    let half_of = match &options.membership {
        Some(membership) if membership.engine == Engine::Device => Some(membership.vm.clone()),
        _ => {
            standing.require_current().map_err(End::environment)?;
            image = image.judged_by(standing.clone());
            None
        }
    };
    if let (Some(sandbox), Some(mark)) = (&mut options.sandbox, standing.place()) {
        sandbox.keeps(mark);
    }
    let protected = conventions.membership().is_some();
    if protected && arguments.num_queues > 1 {
        return Err(End::environment(
            "a protected VM's disk has one queue: leave --num-queues out, or --ft-log",
        ));
    }
    let geometry = Geometry {
        capacity_sectors: image.sectors(),
        read_only: image.is_read_only(),
        queues: arguments.num_queues,
        block_bytes,
        protected,
    };
    let policy = Policy {
        serial: arguments.serial,
        write_through: arguments.cache == Cache::Writethrough,
        on_enospc: arguments.on_enospc,
        poll_ns_max: u64::from(arguments.poll_us) * 1000,
    };
    let threads = arguments.io_threads.unwrap_or(1).min(arguments.num_queues);
    // A stock VMM's disk is what its guest finds after a failover: an image that was away for a moment must not pass.
    let whole = arguments.engine == Engine::Device;
    let fingerprinted = image.try_clone().map_err(End::environment)?;
    let make = move || {
        let image = image.try_clone().map_err(End::environment)?;
        let half = half_of.clone().map(|vm| Half::new(standing.clone(), vm));
        Ok(Disk::new(image, geometry, policy.clone()).as_half(half))
    };
    let fingerprint = move || fingerprinted.fingerprint(whole).map_err(End::environment);
    daemon::serve(&options, "vhost-ft-blk", threads.into(), make, signals, fingerprint)
}
