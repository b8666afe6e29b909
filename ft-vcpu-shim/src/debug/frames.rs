//! What the guest of a replayed journal sent: one JSON object a frame.
//!
//! ```text
//! {"lsn":57,"queue":1,"frame":"ffffffffffff525400..."}    lsn: the entry that had to be committed before the frame left
//! ```

use std::{
    cell::RefCell,
    io::{self, Write},
    path::Path,
    rc::Rc,
};

use ft_client::handshake::hex;
use serde_json::json;

use super::trace;
use crate::{device::offline::OnFrame, error::Error};

struct Out {
    to: Box<dyn Write>,
    /// The first thing that went wrong; nothing is written after it.
    result: io::Result<()>,
}

/// Where frames go.
pub struct Frames {
    out: Rc<RefCell<Out>>,
    name: String,
}

impl Frames {
    /// Frames to `path`, which is created or replaced; `-` is standard output.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let name = path.display().to_string();
        let to = trace::out(path).map_err(|source| failed(&name, &source))?;
        let out = Rc::new(RefCell::new(Out { to, result: Ok(()) }));
        Ok(Self { out, name })
    }

    /// What a device tells its guest's frames to.
    #[must_use]
    pub fn on_frame(&self) -> OnFrame {
        let out = Rc::clone(&self.out);
        Rc::new(move |marker, queue, frame| {
            let out = &mut *out.borrow_mut();
            if out.result.is_ok() {
                let line = json!({ "lsn": marker.0, "queue": queue, "frame": hex(frame) });
                out.result = writeln!(out.to, "{line}");
            }
        })
    }

    /// Nothing more follows.
    ///
    /// # Errors
    /// What the file system refused, then or now.
    pub fn finish(self) -> Result<(), Error> {
        let out = &mut *self.out.borrow_mut();
        let written = std::mem::replace(&mut out.result, Ok(()));
        written
            .and_then(|()| out.to.flush())
            .map_err(|source| failed(&self.name, &source))
    }
}

fn failed(name: &str, source: &io::Error) -> Error {
    Error::environment(format!("cannot write the frames to {name}: {source}. Check --frames"))
}
