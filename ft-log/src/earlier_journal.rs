//! What an earlier run of the VM left in the journal's directory: refused, or recovered and put aside, before anything starts.

use std::{
    io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use ft_client::journal::{self, JournalLock, JournalReader, SegmentFile};
use ft_protocol::Generation;
use tracing::{info, warn};

use crate::{config::EarlierPolicy, exit::StartError};

/// Makes the directory ready for a journal of generation 1, which is what a start begins with, and locks it for the writer.
///
/// # Errors
/// [`StartError`]: nothing that was there is damaged.
pub(crate) fn prepare(directory: &Path, vm: &str, policy: EarlierPolicy) -> Result<JournalLock, StartError> {
    let failed = |what: &'static str| {
        move |source: io::Error| StartError::Path {
            path: directory.to_owned(),
            what,
            source,
        }
    };
    std::fs::create_dir_all(directory).map_err(failed("create the journal's directory"))?;
    let lock = JournalLock::take(directory, vm)?;
    let read = |error| failed("read the journal's directory")(io::Error::other(error));
    let mut own = journal::segments(directory).map_err(read)?;
    own.retain(|file| file.journal.vm == vm);
    let first = own.iter().find(|file| file.journal.generation == Generation::FIRST);
    match (policy, first) {
        (EarlierPolicy::Refuse, Some(file)) => Err(StartError::JournalExists {
            directory: directory.to_owned(),
            name: file.journal.to_string(),
        }),
        (EarlierPolicy::Refuse, None) => Ok(lock),
        (EarlierPolicy::Archive, _) if own.is_empty() => Ok(lock),
        (EarlierPolicy::Archive, _) => {
            recover(&own, &lock);
            let place = archive(directory, vm, &own).map_err(failed("put the earlier journal aside"))?;
            info!(
                "the journal of an earlier run is in {} now ({} segments)",
                place.display(),
                own.len()
            );
            Ok(lock)
        }
    }
}

/// Cuts the torn tails off: the last segment of each generation is the only one that can have one.
fn recover(own: &[SegmentFile], lock: &JournalLock) {
    let is_last = |at: usize| own.get(at + 1).is_none_or(|next| next.journal != own[at].journal);
    for file in (0..own.len()).filter(|at| is_last(*at)).map(|at| &own[at]) {
        let path = file.path.display();
        let torn = JournalReader::open_segment_file(&file.path).and_then(|mut reader| {
            while reader.next_entry()?.is_some() {}
            Ok(reader.torn_tail().cloned())
        });
        match torn {
            Ok(None) => info!("{path}: whole"),
            Ok(Some(torn)) => match torn.cut(lock) {
                Ok(()) => info!("{torn}: cut off, everything before it is whole"),
                Err(error) => warn!("{torn}: it could not be cut off: {error}"),
            },
            // It is kept as it is, for `ft-log verify`.
            Err(error) => warn!("{error}"),
        }
    }
}

/// Moves what is left of the segments into a directory that nobody has used.
fn archive(directory: &Path, vm: &str, own: &[SegmentFile]) -> io::Result<PathBuf> {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let mut number = 0;
    let place = loop {
        let place = directory.join(format!("{vm}.earlier-{}", seconds + number));
        match std::fs::create_dir(&place) {
            Ok(()) => break place,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(error) => return Err(error),
        }
    };
    for file in own.iter().filter(|file| file.path.exists()) {
        std::fs::rename(&file.path, place.join(file.path.file_name().unwrap_or_default()))?;
    }
    for changed in [&place, directory] {
        std::fs::File::open(changed)?.sync_all()?;
    }
    Ok(place)
}
