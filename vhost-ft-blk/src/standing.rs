//! Engine `device`: whether an image may be what its VM's disk holds now.
//!
//! ```text
//!            Joins                  Only: won, or the VM is over on both
//!  no mark ─────────► marked ────────────────────────────────────────► no mark
//!                       │ killed, lost, handed over: it stays
//!                       └─► refused: alone, under another engine, without a backup. Not refused: a pair of equal images
//! ```
//! The host that writes on is not the one that would attach an outdated image: the mark beside the image is what that one knows. It is there
//! before the image is offered to a pair, and goes only when this side is the one that is left or both sides have everything.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use ft_vhost::{device::Part, exit::End};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::warn;

const VERSION: u32 = 1;
/// What is appended to the name of an image.
const SUFFIX: &str = ".ft-state";
/// A mark is a short line; more is none.
const MARK_BYTES_MAX: u64 = 4096;

/// Why an image may not be used, or its mark cannot be had.
#[derive(Debug, Error)]
pub enum StandingError {
    /// Only its pair knows what it is worth.
    #[error(
        "image {image} is refused: it was one of two images of VM '{vm}', and the other one may be ahead of it. Start the VM where it ran last, or \
         make this image equal to that one and form the pair again. If this is the one that is to count: {accept}"
    )]
    Outdated {
        /// Image.
        image: PathBuf,
        /// VM it belonged to.
        vm: String,
        /// The command that takes it as it is.
        accept: String,
    },
    /// What is there cannot be read.
    #[error(
        "{path} should say whether image {image} is current, and cannot be used: {why}. If the image is the one that is to count: {accept}"
    )]
    Unreadable {
        /// Mark.
        path: PathBuf,
        /// Image.
        image: PathBuf,
        /// What is wrong.
        why: String,
        /// The command that takes the image as it is.
        accept: String,
    },
    /// Nothing can be kept beside it.
    #[error(
        "image {0} is no regular file, so its mark has no place beside it: name a file on stable storage with --image-state"
    )]
    NoPlace(PathBuf),
    /// Neither written nor removed.
    #[error("the mark {path} of the image cannot be kept: {source}")]
    Io {
        /// Mark.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What a mark says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    version: u32,
    vm: String,
}

/// The place of an image's mark, if it has one.
#[derive(Clone, Debug)]
pub struct Standing {
    image: PathBuf,
    path: Option<PathBuf>,
    /// That path, if the operator chose it.
    named: Option<PathBuf>,
}

impl Standing {
    /// That of `image`, whose mark is at `path`, or else beside it.
    ///
    /// # Errors
    /// An image that cannot be found.
    pub fn of(image: &Path, path: Option<&Path>) -> io::Result<Self> {
        // By whatever name it is opened, it is the same image.
        let real = fs::canonicalize(image)?;
        let beside = || {
            let mut name = real.clone().into_os_string();
            name.push(SUFFIX);
            PathBuf::from(name)
        };
        let is_file = fs::metadata(&real)?.is_file();
        Ok(Self {
            path: path.map(PathBuf::from).or_else(|| is_file.then(beside)),
            named: path.map(PathBuf::from),
            image: image.into(),
        })
    }

    /// The command that takes the image for the one that counts.
    fn accept(&self) -> String {
        let state = self
            .named
            .iter()
            .map(|path| format!(" --image-state {}", path.display()));
        format!("vhost-ft-blk accept --blk-file {}", self.image.display()) + &state.collect::<String>()
    }

    /// Where the mark is, if it has a place.
    #[must_use]
    pub fn place(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Refuses an image that may be outdated.
    ///
    /// # Errors
    /// [`StandingError::Outdated`], and a mark that cannot be read.
    pub fn require_current(&self) -> Result<(), StandingError> {
        match self.read()? {
            None => Ok(()),
            Some(Mark { vm, .. }) => Err(StandingError::Outdated {
                image: self.image.clone(),
                vm,
                accept: self.accept(),
            }),
        }
    }

    fn read(&self) -> Result<Option<Mark>, StandingError> {
        let Some(path) = &self.path else { return Ok(None) };
        let unreadable = |why: String| StandingError::Unreadable {
            path: path.clone(),
            image: self.image.clone(),
            why,
            accept: self.accept(),
        };
        match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error.to_string())),
            Ok(metadata) if metadata.len() > MARK_BYTES_MAX => return Err(unreadable("it is no mark".into())),
            Ok(_) => {}
        }
        let text = fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
        let mark: Mark = serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        match mark.version {
            VERSION => Ok(Some(mark)),
            other => Err(unreadable(format!(
                "it is of version {other}, and this program knows {VERSION}"
            ))),
        }
    }

    /// Marks the image as one of two of `vm`; gives whether it was marked before. What this says survives a power cut.
    ///
    /// # Errors
    /// [`StandingError`]; nothing has changed then.
    pub fn mark(&self, vm: &str) -> Result<bool, StandingError> {
        let path = self
            .path
            .as_ref()
            .ok_or_else(|| StandingError::NoPlace(self.image.clone()))?;
        let was = self.read()?;
        let mark = Mark {
            version: VERSION,
            vm: vm.into(),
        };
        if was.as_ref() != Some(&mark) {
            write(path, &mark).map_err(|source| StandingError::Io {
                path: path.clone(),
                source,
            })?;
        }
        Ok(was.is_some())
    }

    /// Takes the mark away, whatever it says.
    ///
    /// # Errors
    /// [`StandingError::Io`]; the mark may still be there.
    pub fn clear(&self) -> Result<(), StandingError> {
        let Some(path) = &self.path else { return Ok(()) };
        let removed = match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            removed => removed,
        };
        removed
            .and_then(|()| sync_directory(path))
            .map_err(|source| StandingError::Io {
                path: path.clone(),
                source,
            })
    }
}

/// An image as one of two of a VM.
#[derive(Debug)]
pub struct Half {
    standing: Standing,
    vm: String,
    /// It was marked when it came here.
    was_marked: bool,
}

impl Half {
    /// An image of `vm`.
    #[must_use]
    pub fn new(standing: Standing, vm: String) -> Self {
        Self {
            standing,
            vm,
            was_marked: false,
        }
    }

    /// Keeps the mark as it must be from here on.
    ///
    /// # Errors
    /// [`End::Environment`] where the image may not be used so.
    pub(crate) fn take(&mut self, part: Part) -> Result<(), End> {
        match part {
            Part::Joins => self.was_marked = self.standing.mark(&self.vm).map_err(End::environment)?,
            Part::Alone if self.was_marked => self.standing.require_current().map_err(End::environment)?,
            Part::NeverJoined if self.was_marked => {}
            Part::NeverJoined | Part::Alone | Part::Last => {
                if let Err(error) = self.standing.clear() {
                    warn!(%error, "the image is current, and will be refused as if it were not");
                }
            }
        }
        Ok(())
    }
}

/// Either the old content or the new one is there, whenever the power is cut.
fn write(path: &Path, mark: &Mark) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    // The image's lock keeps others from writing it.
    name.push(".new");
    let temporary = PathBuf::from(name);
    let mut text = serde_json::to_string(mark).map_err(io::Error::other)?;
    text.push('\n');
    let written = File::create(&temporary)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| sync_directory(path));
    if written.is_err() {
        // It is of no use; that it may stay is no harm.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn sync_directory(path: &Path) -> io::Result<()> {
    match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => File::open(parent)?.sync_all(),
        None => File::open(".")?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_marked_image_is_refused_by_whatever_name_until_it_is_cleared() {
        let directory = tempfile::tempdir().unwrap();
        let (image, link) = (directory.path().join("image"), directory.path().join("link"));
        fs::write(&image, [0; 512]).unwrap();
        symlink(&image, &link).unwrap();
        let standing = Standing::of(&image, None).unwrap();
        standing.require_current().unwrap();
        assert!(!standing.mark("web").unwrap());
        assert!(standing.mark("web").unwrap());
        let refused = Standing::of(&link, None).unwrap().require_current().unwrap_err();
        assert!(
            matches!(&refused, StandingError::Outdated { vm, .. } if vm == "web"),
            "{refused}"
        );
        standing.clear().unwrap();
        standing.clear().unwrap();
        Standing::of(&link, None).unwrap().require_current().unwrap();
        let left: Vec<_> = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[test]
    fn a_mark_that_cannot_be_read_refuses_the_image_and_is_not_written_over() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        fs::write(&image, [0; 512]).unwrap();
        let standing = Standing::of(&image, None).unwrap();
        for (text, why) in [
            ("", "EOF"),
            ("{\"version\":2,\"vm\":\"web\"}", "version 2"),
            ("torn{", "expected"),
        ] {
            fs::write(directory.path().join("image.ft-state"), text).unwrap();
            for refused in [
                standing.require_current().unwrap_err(),
                standing.mark("web").unwrap_err(),
            ] {
                assert!(matches!(refused, StandingError::Unreadable { .. }), "{refused}");
                assert!(refused.to_string().contains(why), "{refused}");
            }
        }
        fs::write(directory.path().join("image.ft-state"), vec![b' '; 5000]).unwrap();
        assert!(standing.require_current().unwrap_err().to_string().contains("no mark"));
    }

    #[test]
    fn what_is_no_file_needs_a_place_named() {
        let directory = tempfile::tempdir().unwrap();
        let device = Path::new("/dev/null");
        let nowhere = Standing::of(device, None).unwrap();
        nowhere.require_current().unwrap();
        assert!(matches!(nowhere.mark("web"), Err(StandingError::NoPlace(_))));
        let named = Standing::of(device, Some(&directory.path().join("state"))).unwrap();
        assert!(!named.mark("web").unwrap());
        let refused = named.require_current().unwrap_err();
        assert!(matches!(refused, StandingError::Outdated { .. }), "{refused}");
        let state = directory.path().join("state");
        let advice = format!("accept --blk-file /dev/null --image-state {}", state.display());
        assert!(refused.to_string().ends_with(&advice), "{refused}");
    }
}
