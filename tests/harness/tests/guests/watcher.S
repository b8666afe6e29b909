# A guest that looks at its receive buffers while they belong to the network card.
#
# It posts eight buffers, says "watching", and then goes round: a while of computing, the first byte of every buffer added
# up, the sum written to a port. The port is a stop point and the sum part of its digest. When data reaches the buffers
# only by deliveries, that is at stop points, the sum is the same in every replay; when it reaches them as it arrives, it
# is not. After eight frames the guest powers off.
#
# No interrupts, no stack: ring 0, IF = 0, the loader's page tables.

    .intel_syntax noprefix

    .equ NET, 0xD0001000
    .equ COM1, 0x3F8
    .equ SCRATCH, 0x3FF             # a register of the serial port that does nothing
    .equ POWER_OFF, 0x604
    .equ BUFFERS, 8
    .equ BUFFER_BYTES, 2048
    .equ HEADER_BYTES, 12           # of virtio-net, in front of each frame
    .equ ROUND, 20000

    .macro set register, value
    mov dword ptr [rbx + \register], \value
    .endm

    .macro area register, address
    mov eax, offset \address
    mov dword ptr [rbx + \register], eax
    set \register+4, 0
    .endm

    .macro queue index, descriptors, available, used
    set 0x30, \index
    set 0x38, BUFFERS
    area 0x80, \descriptors
    area 0x90, \available
    area 0xA0, \used
    set 0x44, 1
    .endm

    .text
    .globl _start
_start:
    # Descriptors and available ring of the receive queue.
    xor ecx, ecx
1:  mov eax, ecx
    imul eax, eax, BUFFER_BYTES
    add eax, offset buffers
    mov edx, ecx
    shl edx, 4
    mov qword ptr [receive_descriptors + rdx], rax
    mov dword ptr [receive_descriptors + rdx + 8], BUFFER_BYTES
    mov dword ptr [receive_descriptors + rdx + 12], 2       # the device writes
    mov word ptr [receive_available + 4 + rcx * 2], cx
    inc ecx
    cmp ecx, BUFFERS
    jb 1b
    mov word ptr [receive_available + 2], BUFFERS

    mov ebx, NET
    set 0x70, 0
    set 0x70, 1
    set 0x70, 3
    set 0x24, 1                     # VIRTIO_F_VERSION_1 and nothing else
    set 0x20, 1
    set 0x24, 0
    set 0x20, 0
    set 0x70, 0xB
    queue 0, receive_descriptors, receive_available, receive_used
    queue 1, transmit_descriptors, transmit_available, transmit_used
    set 0x70, 0xF
    set 0x50, 0                     # the buffers are there

    lea rsi, [watching]
    mov edx, COM1
2:  mov al, byte ptr [rsi]
    test al, al
    jz round
    out dx, al
    inc rsi
    jmp 2b

round:
    mov ecx, ROUND
3:  dec ecx
    jnz 3b
    lea rsi, [buffers + HEADER_BYTES]
    mov ecx, BUFFERS
    xor eax, eax
4:  add al, byte ptr [rsi]
    add rsi, BUFFER_BYTES
    dec ecx
    jnz 4b
    mov edx, SCRATCH
    out dx, al
    cmp word ptr [receive_used + 2], BUFFERS
    jb round

    mov edx, POWER_OFF
    mov eax, 0x2000
    out dx, ax
5:  hlt
    jmp 5b

watching:
    .asciz "watching\n"

    .bss
    .balign 4096
receive_descriptors:  .skip 16 * BUFFERS
receive_available:    .skip 64
receive_used:         .skip 128
transmit_descriptors: .skip 16 * BUFFERS
transmit_available:   .skip 64
transmit_used:        .skip 128
    .balign 4096
buffers:              .skip BUFFER_BYTES * BUFFERS
